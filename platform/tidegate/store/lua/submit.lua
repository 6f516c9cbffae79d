-- Group commit of several calls; each is accepted or rejected on its own.
-- ARGV: sender's unix time, is_repeat ('1': a former try may have been carried out), then per call:
--   n, queue, tenant, key, gateway, cohort, session, is_shadowed ('1': its first request has a shadow), then the most
--   requests and bytes of queue, share, tenant and total,
--   and n times: id, deadline, priority, bytes of the body, body, chain of its prompt
-- Returns 7 integers or strings per call: accepted, ahead, waiting, running, drain, limit, and the bound that is
-- passed, its unit, and `shadows` where there are some that could give way.
local now = server_time()
-- Deadlines are written by the sender's clock and kept by the server's.
local skew = now - tonumber(ARGV[1])
local created = string.format('%.3f', now)
local is_repeat = ARGV[2] == '1'
local counters = {} -- name -> what it counts, with what this script adds
local replies, at = {}, 3
local opened = {} -- written together below

local function counter(name)
  if not counters[name] then
    local h = call('HMGET', name, 'requests', 'bytes', 'written', 'drain', 'gone', 'order')
    if h[5] then call('HDEL', name, 'gone') end -- a model that was removed came back
    counters[name] = { requests = tonumber(h[1] or 0), bytes = tonumber(h[2] or 0) + tonumber(h[3] or 0),
      drain = h[4] or '0', order = tonumber(h[6] or 0) }
  end
  return counters[name]
end

-- What runs is charged for its log as well.
local BOUND = { 'model', 'key', 'tenant', 'total' }
local function bound_passed(counted, limits, requests, bytes)
  for i, c in ipairs(counted) do
    if c.requests + requests > limits[2 * i - 1] then return BOUND[i] .. ' requests', limits[2 * i - 1] end
    if c.bytes + bytes > limits[2 * i] then return BOUND[i] .. ' bytes', limits[2 * i] end
  end
  return nil, 0
end

local everything = counter(P .. 'total')
local first_order = everything.order

while at <= #ARGV do
  local n = tonumber(ARGV[at])
  local queue, tenant, key, gateway, cohort, session, is_shadowed = unpack(ARGV, at + 1, at + 7)
  local f = { queue = queue, tenant = tenant, key = key }
  local limits, counted = {}, {}
  for i = 1, 8 do limits[i] = tonumber(ARGV[at + 7 + i]) end
  for i, name in ipairs(counters_of(f)) do counted[i] = counter(name) end
  local first = at + 16
  at = first + 6 * n

  local bytes = 0
  for i = first, at - 1, 6 do bytes = bytes + tonumber(ARGV[i + 3]) end
  local refused, limit = bound_passed(counted, limits, n, bytes)

  local was_written = is_repeat and call('EXISTS', P .. 'req:' .. ARGV[first]) == 1
  local ahead = 0
  if not refused and not was_written then
    local waiting, is_last = line_of(queue).length, nil
    local byte_limits = table.concat({ limits[2], limits[4], limits[6], limits[8] }, ' ')
    for i = first, at - 1, 6 do
      local id = ARGV[i]
      everything.order = everything.order + 1
      local priority = math.max(-1000, math.min(1000, tonumber(ARGV[i + 2])))
      local score = score_of(everything.order, priority)
      local deadline = tonumber(ARGV[i + 1]) + skew
      call('HSET', P .. 'req:' .. id, 'state', 'waiting', 'queue', queue, 'tenant', tenant, 'gateway', gateway,
        'bytes', ARGV[i + 3], 'attempt', 0, 'seq', 0, 'score', score, 'deadline', deadline, 'key', key,
        'limits', byte_limits, 'created', created, 'body', ARGV[i + 4])
      if ARGV[i + 5] ~= '' then call('HSET', P .. 'req:' .. id, 'prefix', ARGV[i + 5]) end
      if cohort ~= '' then call('HSET', P .. 'req:' .. id, 'cohort', cohort) end
      if session ~= '' then call('HSET', P .. 'req:' .. id, 'session', session) end
      if i == first and is_shadowed == '1' then call('HSET', P .. 'req:' .. id, 'pair', id) end
      local is_behind_all = join(queue, id, score, deadline)
      if i == first then is_last = is_behind_all end
      add(opened, gateway, id)
    end
    ahead = is_last and waiting or rank(queue, ARGV[first]) -- a search only where it is needed
    for _, c in ipairs(counted) do c.requests, c.bytes = c.requests + n, c.bytes + bytes end
    tally(f, n, bytes, 0)
  end
  local accepted = was_written or not refused
  local base, waiting = #replies, line_of(queue).length
  replies[base + 1] = accepted and 1 or 0
  replies[base + 2] = ahead
  replies[base + 3] = waiting
  replies[base + 4] = counted[1].requests - waiting
  replies[base + 5] = counted[1].drain
  replies[base + 6] = limit
  replies[base + 7] = refused and refused .. (call('EXISTS', P .. 'shadows') == 1 and ' shadows' or '') or ''
end
write_joined()
for gateway, ids in pairs(opened) do call_with('SADD', P .. 'open:' .. gateway, ids) end
if everything.order > first_order then call('HSET', P .. 'total', 'order', everything.order) end
flush(now)
return replies
