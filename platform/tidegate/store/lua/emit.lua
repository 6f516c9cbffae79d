-- One engine step of one replica.
-- ARGV: result ttl, replica, then per segment: id, attempt, seq, finish reason or '', frame
-- Returns the ids whose attempt is not current; nothing of theirs was written.
local ttl, replica = tonumber(ARGV[1]), ARGV[2]
local held = P .. 'held:' .. replica
local STATE_OF = { stop = 'done', length = 'done', error = 'failed', cancelled = 'cancelled', expired = 'expired' }

local leases, stale, now = {}, {}, nil

local ids = {}
for i = 3, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
for from = 1, #ids, CHUNK do
  local upto = math.min(from + CHUNK - 1, #ids)
  for i, record in ipairs(call('HMGET', held, unpack(ids, from, upto))) do
    leases[ids[from + i - 1]] = unpack_lease(record)
  end
end

-- A write without a lease: the last one again after a lost reply, or one that must not be.
local function was_written(id, attempt, seq)
  local r = call('HMGET', P .. 'req:' .. id, 'state', 'attempt', 'seq')
  return (r[1] == 'done' or r[1] == 'failed') and r[2] == attempt and seq < tonumber(r[3])
end

local function finish(id, seq, reason, framed)
  local f = read_record(id)
  end_lease(id, f)
  if leases[id].suspect then clear_suspect(id, f) end
  departures[f.queue] = (departures[f.queue] or 0) + 1
  settle(id, STATE_OF[reason] or 'failed', f, seq, framed, ttl)
  leases[id] = false
end

-- The first new segment of a suspect clears it, unless it took replicas down after its first tokens.
local function absolve(id, lease)
  local f = read_record(id)
  if f.losses >= LOSSES_TO_SUSPECT then return end
  call('HSET', P .. 'req:' .. id, 'deaths', 0)
  lease.suspect = false
  clear_suspect(id, f)
end

for i = 3, #ARGV, 5 do
  local id, attempt, seq, framed = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 4]
  local lease = leases[id]
  if not lease or lease.attempt ~= attempt then
    if not was_written(id, attempt, seq) then stale[#stale + 1] = id end
  elseif seq > lease.seq then
    -- Redis came back without what it had not fsynced: only another attempt can close the gap.
    local f = read_record(id)
    f.seq = lease.seq
    requeue(id, f)
    leases[id] = false
    stale[#stale + 1] = id
  elseif seq == lease.seq then -- a lower one is written already
    if ARGV[i + 3] ~= '' then
      finish(id, seq, ARGV[i + 3], framed)
    else
      call('APPEND', P .. 'log:' .. id, framed)
      post(lease.gateway, framed)
      if lease.suspect then absolve(id, lease) end
      lease.seq = seq + 1
      lease.is_new = true
    end
  end
end

local pairs_of = {}
for id, lease in pairs(leases) do
  if lease and lease.is_new then
    pairs_of[#pairs_of + 1] = id
    pairs_of[#pairs_of + 1] = pack_lease(lease.attempt, lease.seq, lease.suspect, lease.gateway)
  end
end
call_with('HSET', held, pairs_of)
if next(departures) then now = server_time() end
flush(now)
return stale
