-- A copy of a client's request for a revision that is tried out: behind all others, and only where there is room.
-- ARGV: id of the client's request, id, queue, key, priority, cohort, most that may wait in the queue, the most
--   requests and bytes of the queue and in all, seconds it may wait, bytes of the body, body
-- Returns 1, or 0 where it is refused: it takes at most half of any bound.
local original, id, queue, key, priority, cohort, most = unpack(ARGV, 1, 7)
local queue_requests, queue_bytes, all_requests, all_bytes, seconds, bytes = unpack(ARGV, 8, 13)
local now = server_time()
local f = { queue = queue, tenant = '', key = key }

local function is_half_full(name, requests_limit, bytes_limit)
  local h = call('HMGET', name, 'requests', 'bytes', 'written', 'gone')
  return h[4] or 2 * (tonumber(h[1] or 0) + 1) > tonumber(requests_limit)
    or 2 * (tonumber(h[2] or 0) + tonumber(h[3] or 0) + bytes) > tonumber(bytes_limit)
end

if length(queue) >= tonumber(most) or is_half_full(P .. 'queue:' .. queue, queue_requests, queue_bytes)
  or is_half_full(P .. 'total', all_requests, all_bytes) then
  call('HDEL', P .. 'req:' .. original, 'pair')
  call('DEL', P .. 'pair:' .. original)
  return 0
end

local score = score_of(call('HINCRBY', P .. 'total', 'order', 1), tonumber(priority))
local deadline = now + seconds
local of_queue, of_all = math.floor(queue_bytes / 2), math.floor(all_bytes / 2)
call('HSET', P .. 'req:' .. id, 'state', 'waiting', 'queue', queue, 'tenant', f.tenant, 'gateway', '', 'bytes', bytes,
  'attempt', 0, 'seq', 0, 'score', score, 'deadline', deadline, 'key', key,
  'limits', table.concat({ of_queue, of_queue, of_all, of_all }, ' '), 'created', now, 'cohort', cohort,
  'pair', original, 'body', ARGV[14])
call('SADD', P .. 'shadows', id)
join(queue, id, score, deadline)
write_joined()
tally(f, 1, tonumber(bytes), 0)
flush(now)
return 1
