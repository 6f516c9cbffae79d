-- What the replicas that are alive say. ARGV: stats (JSON texts) or metrics
local alive = call('ZRANGE', P .. 'beats', server_time(), '+inf', 'BYSCORE')
local found = {}
for i = 1, #alive, 500 do
  for _, text in ipairs(call('HMGET', P .. ARGV[1], unpack(alive, i, math.min(i + 499, #alive)))) do
    if text then found[#found + 1] = text end
  end
end
return found
