-- ARGV: message, result ttl, then ids. Waiting or running, a request ends at once; others are left alone.
local ttl = tonumber(ARGV[2])
local count = 0
for i = 3, #ARGV do
  local f = read(ARGV[i])
  if f and (f.state == 'waiting' or f.state == 'running') then
    end_from_outside(ARGV[i], f, 'cancelled', 'cancelled', 'Cancelled', ARGV[1], ttl)
    count = count + 1
  end
end
flush(server_time())
return count
