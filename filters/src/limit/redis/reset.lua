-- Forgets what a scope used. Calls that are open stay live and held.
-- KEYS 3 the scope | ARGV the kind of every dimension, packed
local state = scope(KEYS[3])
if state[1] == 0 then return 0 end
local kinds = unpack_(ARGV[1])
for dimension, counter in pairs(state[3]) do
  local kind = kinds[dimension]
  if kind == 1 then
    state[3][dimension] = {0}
  elseif kind ~= 4 then
    counter[3] = 0
  end
end
-- Whatever is admitted from here on is later than the reset, so that refunds can tell the two apart.
state[2], state[1] = now, now + 1
call('SET', KEYS[3], pack(state), 'KEEPTTL')
return 1
