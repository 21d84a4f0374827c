-- A gateway is alive. Also says whether this store takes writes, and which life of its data this is.
-- KEYS 3 the gateways | ARGV this gateway, for how long in us, an epoch to begin with
-- Reply: the epoch, the number of living gateways, the time, how many of them come before this one by name
call('ZADD', KEYS[3], string.format('%.0f', now + ARGV[2]), ARGV[1])
call('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now))
call('PEXPIRE', KEYS[3], 3600000)
call('HSETNX', KEYS[1], '_e', ARGV[3])
local all, before = call('ZRANGE', KEYS[3], 0, -1), 0
for _, name in ipairs(all) do
  if name < ARGV[1] then before = before + 1 end
end
return {call('HGET', KEYS[1], '_e'), #all, now, before}
