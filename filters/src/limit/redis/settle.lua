-- Charges what calls used and frees their slots; settling twice is settling once.
-- ARGV lease id, tokens (-1 if it never was a call: the request is given back too), and the epoch of its admission, for each of many
-- Reply: for each 1 charged, 0 there is no such lease any more, -1 this store has lost it; then the tokens lost
local reply, lost = {}, 0
for i = 1, #ARGV, 3 do
  local raw = call('HGET', KEYS[1], ARGV[i])
  if raw then
    local tokens = tonumber(ARGV[i + 1])
    lost = lost + charge(unpack_(raw), max(0, tokens), tokens < 0)
    call('HDEL', KEYS[1], ARGV[i])
    call('ZREM', KEYS[2], ARGV[i])
    reply[#reply + 1] = 1
  else
    reply[#reply + 1] = call('HGET', KEYS[1], '_e') == ARGV[i + 2] and 0 or -1
  end
end
save()
reply[#reply + 1] = lost
return reply
