-- What all scripts of the ledger share; each of them is this text with its own behind it.
--
-- KEYS[1] is the hash of leases, KEYS[2] the sorted set of when they expire. A scope is one string,
-- {time, reset, {counter by dimension}}, packed. A counter is
--   rolling   {total, last, n, last, n, ...}: sub-buckets by the time of their last admission, oldest first
--   calendar  {start, end, used, held, and the same four of the period before}
--   live      a number
-- The rules of a scope come packed as {ttl in ms, zone, rule...}, the zone being
--   {seconds east of UTC, from which second on other ones, which, from which second on, which...}, the changes around now,
-- and a rule
--   {dimension, kind (1 rolling, 2 day, 3 month, 4 live), 1 if it counts tokens, limit, window in us, 1 if shadow}
-- A lease is {admitted, estimate, charge, 1 if expired, {{scope key, rules, grant...}...}}; a grant is the start of
-- the calendar period that was charged. All times are microseconds of this server's clock.
-- The keys of scopes that a lease names are not declared; they carry the hash tag of KEYS[1], so they are on its node.
local call, pack, unpack_, floor, max = redis.call, cmsgpack.pack, cmsgpack.unpack, math.floor, math.max
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local scopes, ttls = {}, {}

-- The state of a scope; a clock that stepped back does not turn the time of a scope.
local function scope(key)
  local state = scopes[key]
  if not state then
    local raw = call('GET', key)
    state = raw and unpack_(raw) or {0, 0, {}}
    scopes[key] = state
    if state[1] > now then now = state[1] end
  end
  return state
end

local function save()
  for key, ttl in pairs(ttls) do
    scopes[key][1] = max(scopes[key][1], now)
    call('SET', key, pack(scopes[key]), 'PX', ttl)
  end
end

local function expire_at(id, at)
  call('ZADD', KEYS[2], string.format('%.0f', at), id)
end

-- Drops the buckets whose last admission is as old as the window.
local function age(counter, window)
  local first = 2
  while counter[first] and counter[first] + window <= now do
    counter[1] = counter[1] - counter[first + 1]
    first = first + 2
  end
  if first > 2 then
    local size = #counter
    for i = first, size do counter[i - first + 2] = counter[i] end
    for i = size - first + 3, size do counter[i] = nil end
  end
end

-- Place of the bucket of that time, or of the one before it; and whether it is the one.
local function find(counter, window, at)
  local width = window / 20
  local index, i = floor(at / width), #counter - 1
  while i >= 2 and floor(counter[i] / width) > index do i = i - 2 end
  return i, i >= 2 and floor(counter[i] / width) == index
end

local function put(counter, window, at, n)
  local i, found = find(counter, window, at)
  counter[1] = counter[1] + n
  if found then
    counter[i + 1] = counter[i + 1] + n
    if at > counter[i] then counter[i] = at end
  else
    if i < 2 then i = 0 end
    table.insert(counter, i + 2, at)
    table.insert(counter, i + 3, n)
  end
end

local function refund(counter, window, at, n)
  local i, found = find(counter, window, at)
  if found then
    if n > counter[i + 1] then n = counter[i + 1] end
    counter[i + 1] = counter[i + 1] - n
    counter[1] = counter[1] - n
  end
end

local function first_day(year, month)
  if month <= 2 then year = year - 1 end
  local era = floor(year / 400)
  local of_era, from_march = year - era * 400, (month + 9) % 12
  return era * 146097 + of_era * 365 + floor(of_era / 4) - floor(of_era / 100)
    + floor((153 * from_march + 2) / 5) - 719468
end

-- The second in which a day begins: the first time that its zone writes its date, also where the clocks are changed.
local function begin(zone, day)
  local from
  for i = 1, #zone, 2 do
    local at = day * 86400 - zone[i]
    if from and at < from then at = from end
    from = zone[i + 1]
    if not from or at < from then return at end
  end
end

-- First microsecond of the day or month of that time in that zone, and of the next.
local function period(kind, zone, at)
  local second, offset = floor(at / 1000000), zone[1]
  for i = 2, #zone, 2 do
    if zone[i] <= second then offset = zone[i + 1] end
  end
  local day = floor((second + offset) / 86400)
  if begin(zone, day + 1) <= second then day = day + 1 end
  local first, following = day, day + 1
  if kind == 3 then
    local shifted = day + 719468
    local era = floor(shifted / 146097)
    local of_era = shifted - era * 146097
    local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    local from_march = floor((5 * of_year + 2) / 153)
    local month = from_march < 10 and from_march + 3 or from_march - 9
    year = year + era * 400
    if month <= 2 then year = year + 1 end
    first = first_day(year, month)
    if month == 12 then following = first_day(year + 1, 1) else following = first_day(year, month + 1) end
  end
  return max(0, begin(zone, first) * 1000000), max(0, begin(zone, following) * 1000000)
end

-- used, held, microseconds until more is left, until all is
local function reading(counter, rule, zone)
  local kind = rule[2]
  if kind == 1 then
    if not counter then return 0, 0, 0, 0 end
    age(counter, rule[5])
    local more, all = 0, 0
    for i = 2, #counter, 2 do
      if counter[i + 1] > 0 then
        all = counter[i] + rule[5] - now
        if more == 0 then more = all end
      end
    end
    return counter[1], 0, more, all
  elseif kind == 4 then
    return counter or 0, 0, 0, 0
  elseif counter and now < counter[2] then
    return counter[3], counter[4], counter[2] - now, counter[2] - now
  end
  local _, ending = period(kind, zone, now)
  return 0, 0, ending - now, ending - now
end

-- 0 if n more fit, else the microseconds after which they do, or -1 for never.
local function verdict(counter, rule, n)
  if n > rule[4] then return -1 end
  if not counter then return 0 end
  local room, kind = rule[4] - n, rule[2]
  if kind == 1 then
    age(counter, rule[5])
    local used = counter[1]
    if used <= room then return 0 end
    for i = 2, #counter, 2 do
      used = used - counter[i + 1]
      if used <= room then return counter[i] + rule[5] - now end
    end
  elseif kind == 4 then
    if counter > room then return 1000000 end
  elseif now < counter[2] and counter[3] + counter[4] > room then
    return counter[2] - now
  end
  return 0
end

-- The counter of a rule, in the present period if it has one; made if there is none.
local function open(state, rule, zone)
  local counter, kind = state[3][rule[1]], rule[2]
  if kind == 1 then
    if not counter then counter = {0} end
    age(counter, rule[5])
  elseif kind == 4 then
    counter = counter or 0
  elseif not counter or now >= counter[2] then
    local old = counter or {0, 0, 0, 0}
    local start, ending = period(kind, zone, now)
    counter = {start, ending, 0, 0, old[1], old[2], old[3], old[4]}
  end
  state[3][rule[1]] = counter
  return counter
end

-- Where the period of that time begins in an open counter of a calendar: 1 the present one, 5 the one before, which is
-- made if nothing was known of it; nil if it is older. Then when the period started.
local function place(counter, kind, zone, at)
  if at >= counter[1] then return 1, counter[1] end
  if at >= counter[5] and at < counter[6] then return 5, counter[5] end
  local start, ending = period(kind, zone, at)
  if ending ~= counter[1] then return nil, start end
  counter[5], counter[6], counter[7], counter[8] = start, ending, 0, 0
  return 5, start
end

-- Charges n requests, or the tokens of one: held where the period has holds, else prepaid. They were admitted at that
-- time, which may lie back if this store was away then. Gives the grant, and whether some period took them.
local function take(state, rule, zone, n, hold, at)
  local counter, kind = open(state, rule, zone), rule[2]
  if kind == 1 then
    local _, found = find(counter, rule[5], at)
    if found or at + rule[5] > now then put(counter, rule[5], at, n) end
  elseif kind == 4 then
    state[3][rule[1]] = counter + n
  else
    local first, start = place(counter, kind, zone, at)
    if first then
      local field = first + (hold and 3 or 2)
      counter[field] = counter[field] + n
    end
    return start, first ~= nil
  end
  return 0, true
end

-- Charges what the call of a lease used; gives the tokens that no period took. With `never` it was no call at all.
local function charge(lease, tokens, never)
  local live, lost = lease[4] == 0, 0
  local before = live and lease[2] or lease[3]
  for _, set in ipairs(lease[5]) do scope(set[1]) end
  for _, set in ipairs(lease[5]) do
    local state, rules = scope(set[1]), unpack_(set[2])
    ttls[set[1]] = max(ttls[set[1]] or 0, rules[1])
    for r = 3, #rules do
      local rule, grant = rules[r], set[r]
      local counter, kind = state[3][rule[1]], rule[2]
      if kind == 4 then
        if live and counter then state[3][rule[1]] = max(0, counter - 1) end
      elseif rule[3] == 0 then
        -- A request that was admitted is a request, whatever became of it.
        if never and kind == 1 and lease[1] > state[2] then
          refund(open(state, rule, rules[2]), rule[5], lease[1], 1)
        elseif never and kind ~= 1 and counter then
          local at = counter[1] == grant and 3 or counter[5] == grant and 7
          if at then counter[at] = max(0, counter[at] - 1) end
        end
      elseif kind == 1 then
        counter = open(state, rule, rules[2])
        if tokens > before then
          local _, found = find(counter, rule[5], lease[1])
          put(counter, rule[5], (found or lease[1] + rule[5] > now) and lease[1] or now, tokens - before)
        elseif lease[1] > state[2] then
          refund(counter, rule[5], lease[1], before - tokens)
        end
      else
        local at = counter and (counter[1] == grant and counter[2] > 0 and 1 or counter[5] == grant and counter[6] > 0 and 5)
        if not at then
          lost = tokens
        elseif live then
          counter[at + 3] = max(0, counter[at + 3] - before)
          counter[at + 2] = counter[at + 2] + tokens
        else
          counter[at + 2] = max(0, counter[at + 2] + tokens - before)
        end
      end
    end
  end
  return lost
end

-- Appends to the reply how every rule of the sets stands; the scopes are KEYS from 3 on.
local function standings(reply, sets)
  for i, rules in ipairs(sets) do
    local state = scope(KEYS[i + 2])
    for r = 3, #rules do
      for _, number in ipairs({reading(state[3][rules[r][1]], rules[r], rules[2])}) do reply[#reply + 1] = number end
    end
  end
  return reply
end
