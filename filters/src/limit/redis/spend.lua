-- Charges calls that were admitted while this store was away and have ended meanwhile.
-- KEYS 3.. their scopes | ARGV a mark that makes it happen once, how long to keep that in ms, requests, tokens, then the
-- rules of each scope
-- Reply: 1 charged, 0 it was before
if not call('SET', ARGV[1], 1, 'NX', 'PX', ARGV[2]) then return 0 end
local requests, tokens = tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 3, #KEYS do scope(KEYS[i]) end
for i = 3, #KEYS do
  local rules, state = unpack_(ARGV[i + 2]), scopes[KEYS[i]]
  for r = 3, #rules do
    local n = rules[r][3] == 1 and tokens or requests
    if rules[r][2] ~= 4 and n > 0 then take(state, rules[r], rules[2], n, false) end
  end
  ttls[KEYS[i]] = rules[1]
end
save()
return 1
