-- Tells that calls live, and what they used so far.
-- ARGV lease ttl in us, then lease id and progress of each
-- Reply: for each 1 lives on, 2 expired and charged, 0 there is no such lease
local reply = {}
for i = 2, #ARGV, 2 do
  local id, raw = ARGV[i], call('HGET', KEYS[1], ARGV[i])
  local lease = raw and unpack_(raw)
  if not lease then
    reply[#reply + 1] = 0
  elseif lease[4] == 1 then
    reply[#reply + 1] = 2
  else
    lease[3] = max(lease[3], tonumber(ARGV[i + 1]))
    call('HSET', KEYS[1], id, pack(lease))
    for _, set in ipairs(lease[5]) do
      if #set > 2 then call('PEXPIRE', set[1], unpack_(set[2])[1]) end
    end
    expire_at(id, now + ARGV[1])
    reply[#reply + 1] = 1
  end
end
return reply
