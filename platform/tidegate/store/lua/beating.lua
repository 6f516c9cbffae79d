-- The statistics of the replicas that are alive, as JSON texts.
local alive = call('ZRANGE', P .. 'beats', server_time(), '+inf', 'BYSCORE')
local found = {}
for i = 1, #alive, 500 do
  for _, text in ipairs(call('HMGET', P .. 'stats', unpack(alive, i, math.min(i + 499, #alive)))) do
    if text then found[#found + 1] = text end
  end
end
return found
