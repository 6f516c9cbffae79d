-- Requests that wait for a revision go to another one of the model, at their old places and with their deadlines.
-- ARGV: queue, the other queue, may_continue ('1': also those that have emitted; '': they end), code, message,
--   result ttl, most in this call
-- Returns how many are left waiting. Shadows end here: they were for this revision alone.
local from, to, may_continue = ARGV[1], ARGV[2], ARGV[3] == '1'
local code, message, ttl, most = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
for _, id in ipairs(some_of(from, most)) do
  local f = read_record(id)
  if not f or f.state ~= 'waiting' then
    leave(from, id)
  elseif is_shadow(f) then
    end_from_outside(id, f, 'cancelled', 'cancelled', code, message, ttl)
  elseif f.seq > 0 and not may_continue then
    end_from_outside(id, f, 'failed', 'error', code, message, ttl)
  else
    leave(from, id)
    tally(f, -1, -f.bytes, -charged(f.written))
    f.queue = to
    tally(f, 1, f.bytes, charged(f.written))
    call('HSET', P .. 'req:' .. id, 'queue', to)
    call('HDEL', P .. 'req:' .. id, 'cohort', 'pair') -- the other revision's end says nothing about this one
    rejoin(to, id, f.score, is_suspect(f), f.seq == 0 and f.deadline)
  end
end
flush(server_time())
return length(from)
