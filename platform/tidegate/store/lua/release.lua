-- Give leased requests back. ARGV: replica, is_fault ('1': as after the replica's death), why, result ttl,
-- then per lease: id, attempt. Repeating it does nothing: a request given back is not running.
local replica, is_fault, why, ttl = ARGV[1], ARGV[2] == '1', ARGV[3], tonumber(ARGV[4])
local now = server_time()
for i = 5, #ARGV, 2 do
  local id = ARGV[i]
  local f = read(id)
  if f and f.state == 'running' and f.attempt == ARGV[i + 1] then
    if is_fault then lose(id, f, why, ttl) else requeue(id, f) end
  end
end
-- Only now: while the requests above were judged, the suspect among them took the blame for all.
local record = P .. 'replica:' .. replica
local suspect = call('HGET', record, 'suspect')
if suspect and call('HGET', P .. 'req:' .. suspect, 'state') ~= 'running' then call('HDEL', record, 'suspect') end
flush(now)
return 0
