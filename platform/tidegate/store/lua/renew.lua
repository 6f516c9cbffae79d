-- ARGV: replica, lease seconds, seconds to keep the replica's record, then per lease: id, attempt
-- Returns the ids that are no longer this replica's.
local replica = ARGV[1]
local expiry = server_time() + tonumber(ARGV[2])
local lost, CHUNK = {}, 1000
for from = 4, #ARGV, 2 * CHUNK do
  local ids, kept = {}, {}
  for i = from, math.min(from + 2 * CHUNK - 1, #ARGV), 2 do ids[#ids + 1] = ARGV[i] end
  for i, record in ipairs(call('HMGET', P .. 'held:' .. replica, unpack(ids))) do
    local lease = unpack_lease(record)
    if lease and lease.attempt == ARGV[from + 2 * i - 1] then
      kept[#kept + 1] = expiry
      kept[#kept + 1] = ids[i]
    else
      lost[#lost + 1] = ids[i]
    end
  end
  if #kept > 0 then call('ZADD', P .. 'leases', 'XX', unpack(kept)) end
end
call('EXPIRE', P .. 'replica:' .. replica, tonumber(ARGV[3]))
return lost
