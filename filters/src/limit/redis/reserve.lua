-- Decides one call over all its rules, all or nothing.
-- KEYS 3.. its scopes | ARGV lease id, lease ttl in us, tokens to reserve, tokens to charge if nobody settles it,
-- 1 to count it whatever the rules say (it was admitted while we were away), the time after which nobody waits for the
-- answer, or at which it was admitted then (0 for none), then the rules of each scope
-- Reply: 1 admitted, 0 refused, 2 the lease is there already, 3 too late; the place of the rule that refused; its wait (-1 never); then
-- for every rule used, held, until more, until all; at last the places of the rules that it went beyond
local id, tokens, sets, beyond = ARGV[1], tonumber(ARGV[3]), {}, {}
if ARGV[5] == '1' and call('HEXISTS', KEYS[1], id) == 1 then return {2, 0, 0} end
local at = tonumber(ARGV[6])
if ARGV[5] ~= '1' and at ~= 0 and now > at then return {3, 0, 0} end
for i = 3, #KEYS do
  sets[i - 2] = unpack_(ARGV[i + 4])
  scope(KEYS[i])
end
local place, binding, worst = 0, 0, 0
for i, rules in ipairs(sets) do
  local state = scopes[KEYS[i + 2]]
  for r = 3, #rules do
    local rule = rules[r]
    local wait = verdict(state[3][rule[1]], rule, rule[3] == 1 and tokens or 1)
    if wait ~= 0 then
      beyond[#beyond + 1] = place
      if rule[6] == 0 and worst ~= -1 and (wait == -1 or wait > worst) then binding, worst = place, wait end
    end
    place = place + 1
  end
end
local admitted = worst == 0 or ARGV[5] == '1'
if admitted then
  if ARGV[5] ~= '1' or at == 0 or at > now then at = now end
  local lease = {at, tokens, tonumber(ARGV[4]), 0, {}}
  for i, rules in ipairs(sets) do
    local key = KEYS[i + 2]
    local set = {key, ARGV[i + 6]}
    for r = 3, #rules do
      local rule = rules[r]
      set[r] = take(scopes[key], rule, rules[2], rule[3] == 1 and tokens or 1, rule[3] == 1, at)
    end
    lease[5][i] = set
    ttls[key] = rules[1]
  end
  save()
  call('HSET', KEYS[1], id, pack(lease))
  expire_at(id, now + ARGV[2])
end
local reply = standings({admitted and 1 or 0, binding, worst}, sets)
for _, at in ipairs(beyond) do reply[#reply + 1] = at end
return reply
