-- A queue goes away with its model or revision. ARGV: queue, code, message, result ttl, most in this call.
-- What waits is cancelled; what runs finishes, and the last one takes the queue's records with it.
-- Returns how many are left waiting: call again until 0.
local queue, code, message, ttl, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local key = P .. 'queue:' .. queue
for _, id in ipairs(some_of(queue, most)) do
  local f = read(id)
  if f then
    end_from_outside(id, f, 'cancelled', 'cancelled', code, message, ttl)
  else
    leave(queue, id)
  end
end
local left = length(queue)
if left == 0 and call('EXISTS', key) == 1 then call('HSET', key, 'gone', 1) end
flush(server_time())
if left == 0 and tonumber(call('HGET', key, 'requests') or 0) <= 0 then
  call('DEL', key, P .. 'outcomes:' .. queue)
end
return left
