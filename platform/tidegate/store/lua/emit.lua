-- One engine step of one replica.
-- ARGV: result ttl, replica, is_full ('1': Redis has no memory left), then per segment: id, attempt, seq,
--   '' or, of a last one, the finish reason and the outcomes that it counts as, frame
-- Returns the ids whose attempt is not current; nothing of theirs was written.
local ttl, replica, is_full = tonumber(ARGV[1]), ARGV[2], ARGV[3] == '1'
local held = P .. 'held:' .. replica
local STATE_OF = { stop = 'done', length = 'done', error = 'failed', cancelled = 'cancelled', expired = 'expired' }

local leases, stale, now = {}, {}, nil

local ids = {}
for i = 4, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
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

local function finish(id, seq, words, framed)
  local reason, ends = string.match(words, '^(%S+) ?(.*)$')
  local f = read_record(id)
  f.written = leases[id].written
  end_lease(id, f)
  if leases[id].suspect then clear_suspect(id, f) end
  departures[f.queue] = (departures[f.queue] or 0) + 1
  settle(id, STATE_OF[reason] or 'failed', f, seq, framed, ttl, ends)
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

-- Which bound the logs of all who run pass together with `more` of this one, where this one holds more than its equal
-- part: the largest end, so that the others go on. Where memory is full, all may hold what they hold, and an equal part
-- is at least FULL_BYTES.
local WHOSE = { 'the queue of the model may hold', "one key's share of the model's queue may hold",
  "the tenant's share of the queue may hold", 'the queue may hold' }
local FULL_BYTES, MOST_LOG_BYTES = 262144, 16777216
local function bound_passed(f, written, more)
  if written > MOST_LOG_BYTES then return 'its log has more than ' .. MOST_LOG_BYTES .. ' bytes' end
  local running, limits = call('ZCARD', P .. 'leases'), {}
  for limit in string.gmatch(f.limits or '', '%d+') do limits[#limits + 1] = tonumber(limit) end
  for i, name in ipairs(counters_of(f)) do
    local h = call('HMGET', name, 'requests', 'written')
    local all = tonumber(h[2] or 0) + (tallies[name] and tallies[name][3] or 0) + more
    local sharers = math.max(1, math.min(tonumber(h[1] or 0), running))
    if limits[i] and all > limits[i] and written > limits[i] / sharers then
      return 'its log and those beside it are more than the ' .. limits[i] .. ' bytes that ' .. WHOSE[i]
    elseif is_full and COUNTERS[i] == 'total' and written > math.max(FULL_BYTES, all / sharers) then
      return 'the queue has no memory left'
    end
  end
end

-- Charge a running request for a segment; false where it ends instead.
local function charge(id, lease, framed)
  local written = lease.written + #framed
  local more = charged(written) - charged(lease.written)
  if more > 0 then
    local f = read_record(id)
    local passed = bound_passed(f, written, more)
    if passed then
      f.seq, f.written = lease.seq, lease.written
      if lease.suspect then clear_suspect(id, f) end
      end_from_outside(id, f, 'failed', 'error', 'AnswerTooLarge',
        'The answer was ended: ' .. passed .. '. Ask for fewer sequences, tokens or logprobs.', ttl)
      return false
    end
    tally(f, 0, 0, more)
  end
  lease.written = written
  return true
end

for i = 4, #ARGV, 5 do
  local id, attempt, seq, framed = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 4]
  local lease = leases[id]
  if not lease or lease.attempt ~= attempt then
    if not was_written(id, attempt, seq) then stale[#stale + 1] = id end
  elseif seq > lease.seq then
    -- Redis came back without what it had not fsynced: only another attempt can close the gap.
    local f = read_record(id)
    f.seq, f.written = lease.seq, lease.written
    requeue(id, f)
    leases[id] = false
    stale[#stale + 1] = id
  elseif seq == lease.seq then -- a lower one is written already
    if ARGV[i + 3] ~= '' then
      finish(id, seq, ARGV[i + 3], framed)
    elseif not charge(id, lease, framed) then
      leases[id] = false
      stale[#stale + 1] = id
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
    pairs_of[#pairs_of + 1] = pack_lease(lease.attempt, lease.seq, lease.suspect, lease.gateway,
      lease.written)
  end
end
call_with('HSET', held, pairs_of)
if next(departures) then now = server_time() end
flush(now)
return stale
