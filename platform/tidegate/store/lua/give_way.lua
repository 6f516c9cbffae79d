-- Shadows that wait leave the line for a client. ARGV: the queues in which they do; '': in all
-- Returns how many did.
local MOST = 256
local gave_way = 0
for _, id in ipairs(call('SRANDMEMBER', P .. 'shadows', MOST)) do
  local f = read_record(id)
  for _, queue in ipairs(ARGV) do
    if f and f.state == 'waiting' and (queue == '' or f.queue == queue) then
      end_from_outside(id, f, 'cancelled', 'cancelled', 'GaveWay', '', 1)
      gave_way, f = gave_way + 1, nil
    end
  end
end
flush(server_time())
return gave_way
