-- A provider's grant as token buckets that refill all the time; what `bucket` does in memory, to the last figure.
-- KEYS 3 the buckets | ARGV for requests and then for tokens: the grant of a minute (below 0: no limit), units below which
-- calls are spread, how many are asked for, how many are given back; then the longest delay in ms
-- Reply: 1 if the call was counted, its delay in ms, the level of requests, the level of tokens
local unit, minute, ms = 60000, 60000, floor(now / 1000)
local was = call('HMGET', KEYS[3], 'r', 't', 'at')
local at = tonumber(was[3] or ms)
local passed = math.min(max(ms - at, 0), minute)
at = max(at, ms)
local levels, after, delay, lasts = {}, {}, 0, 0
for i = 1, 2 do
  local first = (i - 1) * 4
  local grant, spread = tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2])
  local asked, back = tonumber(ARGV[first + 3]), tonumber(ARGV[first + 4])
  local full = grant * unit
  if grant < 0 then
    levels[i], after[i] = 0, 0
  else
    local level = max(math.min(tonumber(was[i] or full) + passed * grant + back * unit, full), -full)
    local need, wait = math.min(asked * unit, full), 0
    levels[i], after[i] = level, level - need
    if need > 0 then
      local lacks = max(math.min(spread, full - need) - after[i], 0)
      local part = math.fmod(lacks, grant)
      wait = (lacks - part) / grant + (part > 0 and 1 or 0)
    elseif asked > 0 then
      wait = minute
    end
    delay = max(delay, wait)
    if grant > 0 then lasts = max(lasts, (full - after[i]) / grant) end
  end
end
local granted = delay <= tonumber(ARGV[9])
if granted then levels = after end
call('HSET', KEYS[3], 'r', string.format('%.0f', levels[1]), 't', string.format('%.0f', levels[2]), 'at', string.format('%.0f', at))
call('PEXPIRE', KEYS[3], math.ceil(lasts) + 1000)
return {granted and 1 or 0, delay, levels[1], levels[2]}
