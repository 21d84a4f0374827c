-- How the rules stand; writes nothing.
-- KEYS 3.. the scopes | ARGV the rules of each scope
-- Reply: for every rule used, held, until more, until all
local sets = {}
for i = 3, #KEYS do
  sets[i - 2] = unpack_(ARGV[i - 2])
  scope(KEYS[i])
end
return standings({}, sets)
