-- Group commit of several calls; each is accepted or rejected on its own.
-- ARGV: sender's unix time, is_repeat ('1': a former try may have been carried out), then per call:
--   n, queue, tenant, gateway, model max requests, model max bytes, tenant.., tenant.., total.., total..,
--   and n times: id, deadline, priority, cost, bytes of the body, body
-- Returns 7 integers or strings per call: accepted, ahead, waiting, running, drain, bound and unit, limit.
local now = server_time()
-- Deadlines are written by the sender's clock and kept by the server's.
local skew = now - tonumber(ARGV[1])
local is_repeat = ARGV[2] == '1'
local queues, tenants, everything = {}, {}, nil
local replies, at = {}, 3
local opened = {} -- written together below

local function counters(key)
  local h = call('HMGET', key, 'requests', 'bytes', 'drain', 'gone', 'order')
  if h[4] then call('HDEL', key, 'gone') end -- a model that was removed came back
  return { requests = tonumber(h[1] or 0), bytes = tonumber(h[2] or 0), drain = h[3] or '0',
    order = tonumber(h[5] or 0) }
end

everything = counters(P .. 'total')
local first_order = everything.order

while at <= #ARGV do
  local n, queue, tenant, gateway = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local limits = { tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6]),
    tonumber(ARGV[at + 7]), tonumber(ARGV[at + 8]), tonumber(ARGV[at + 9]) }
  local first = at + 10
  at = first + 6 * n
  local q, t = queues[queue], tenants[tenant]
  if not q then q = counters(P .. 'queue:' .. queue); queues[queue] = q end
  if not t then t = counters(P .. 'tenant:' .. tenant); tenants[tenant] = t end

  local bytes = 0
  for i = first, at - 1, 6 do bytes = bytes + tonumber(ARGV[i + 4]) end
  local refused, limit = nil, 0
  if q.requests + n > limits[1] then refused, limit = 'model requests', limits[1]
  elseif q.bytes + bytes > limits[2] then refused, limit = 'model bytes', limits[2]
  elseif t.requests + n > limits[3] then refused, limit = 'tenant requests', limits[3]
  elseif t.bytes + bytes > limits[4] then refused, limit = 'tenant bytes', limits[4]
  elseif everything.requests + n > limits[5] then refused, limit = 'total requests', limits[5]
  elseif everything.bytes + bytes > limits[6] then refused, limit = 'total bytes', limits[6] end

  local was_written = is_repeat and call('EXISTS', P .. 'req:' .. ARGV[first]) == 1
  local ahead = 0
  if not refused and not was_written then
    local waiting, is_last = line_of(queue).length, nil
    for i = first, at - 1, 6 do
      local id = ARGV[i]
      everything.order = everything.order + 1
      local priority = math.max(-1000, math.min(1000, tonumber(ARGV[i + 2])))
      local score = score_of(everything.order, priority)
      local deadline = tonumber(ARGV[i + 1]) + skew
      call('HSET', P .. 'req:' .. id, 'state', 'waiting', 'queue', queue, 'tenant', tenant, 'gateway', gateway,
        'bytes', ARGV[i + 4], 'attempt', 0, 'seq', 0, 'score', score, 'deadline', deadline,
        'priority', priority, 'cost', ARGV[i + 3], 'body', ARGV[i + 5])
      local is_behind_all = join(queue, id, score, deadline)
      if i == first then is_last = is_behind_all end
      add(opened, gateway, id)
    end
    ahead = is_last and waiting or rank(queue, ARGV[first]) -- a search only where it is needed
    q.requests = q.requests + n; q.bytes = q.bytes + bytes
    t.requests = t.requests + n; t.bytes = t.bytes + bytes
    everything.requests = everything.requests + n; everything.bytes = everything.bytes + bytes
    tally(queue, tenant, n, bytes)
  end
  local accepted = was_written or not refused
  local base, waiting = #replies, line_of(queue).length
  replies[base + 1] = accepted and 1 or 0
  replies[base + 2] = ahead
  replies[base + 3] = waiting
  replies[base + 4] = q.requests - waiting
  replies[base + 5] = q.drain
  replies[base + 6] = refused or ''
  replies[base + 7] = limit
end
write_joined()
for gateway, ids in pairs(opened) do call_with('SADD', P .. 'open:' .. gateway, ids) end
if everything.order > first_order then call('HSET', P .. 'total', 'order', everything.order) end
flush(now)
return replies
