-- Charges leases that expired at their last known progress, and remembers them for a late settlement.
-- ARGV how long to remember in us, how many at most
-- Reply: leases charged, tokens lost
local charged, lost = 0, 0
local due = call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(due) do
  local raw = call('HGET', KEYS[1], id)
  local lease = raw and unpack_(raw)
  if lease and lease[4] == 0 then
    lost = lost + charge(lease, lease[3])
    lease[4] = 1
    call('HSET', KEYS[1], id, pack(lease))
    expire_at(id, now + ARGV[1])
    charged = charged + 1
  else
    call('HDEL', KEYS[1], id)
    call('ZREM', KEYS[2], id)
  end
end
save()
return {charged, lost}
