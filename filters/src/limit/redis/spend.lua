-- Charges calls that were admitted while this store was away and have ended meanwhile, each to the time of its admission.
-- KEYS 3.. their scopes | ARGV a mark that makes it happen once, how long to keep that in ms, how many times follow, then
-- for each the time (0 for now), requests, tokens; then the rules of each scope
-- Reply: 1 charged, 0 it was before; the tokens that no period took
if not call('SET', ARGV[1], 1, 'NX', 'PX', ARGV[2]) then return {0, 0} end
local times, lost = tonumber(ARGV[3]), 0
for i = 3, #KEYS do scope(KEYS[i]) end
for t = 1, times do
  local at, requests, tokens = tonumber(ARGV[3 * t + 1]), tonumber(ARGV[3 * t + 2]), tonumber(ARGV[3 * t + 3])
  if at == 0 or at > now then at = now end
  local all = true
  for i = 3, #KEYS do
    local rules, state = unpack_(ARGV[1 + 3 * times + i]), scopes[KEYS[i]]
    for r = 3, #rules do
      local rule, n = rules[r], rules[r][3] == 1 and tokens or requests
      if rule[2] ~= 4 and n > 0 then
        local _, took = take(state, rule, rules[2], n, false, at)
        all = all and (took or rule[3] == 0)
      end
    end
    ttls[KEYS[i]] = rules[1]
  end
  if not all then lost = lost + tokens end
end
save()
return {1, lost}
