-- Who has no token yet, of a session one. ARGV: most that are looked at, queue, then the replicas that may run requests of it
-- Returns the server's time, then per request: cohort, time of its submit.
local most, queue = tonumber(ARGV[1]), ARGV[2]
local found, looked, sessions = { tostring(server_time()) }, 0, {}

local function look(id)
  looked = looked + 1
  local r = call('HMGET', P .. 'req:' .. id, 'cohort', 'created', 'seq', 'queue', 'tenant', 'session')
  if r[2] and r[3] == '0' and r[4] == queue then -- a request of the version before has no such time
    local session = r[6] and r[5] .. ':' .. r[6]
    if session and sessions[session] then return end
    if session then sessions[session] = true end
    found[#found + 1] = r[1] or ''
    found[#found + 1] = r[2]
  end
end

for _, id in ipairs(some_of(queue, most)) do look(id) end
for i = 3, #ARGV do
  local held = call('HGETALL', P .. 'held:' .. ARGV[i])
  for at = 1, #held, 2 do
    if looked < most and unpack_lease(held[at + 1]).seq == 0 then look(held[at]) end
  end
end
return found
