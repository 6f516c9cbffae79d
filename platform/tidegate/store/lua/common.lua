-- Requests, leases and counters, for all scripts. What ends, is counted or published is gathered for flush().
local DEATHS_TO_POISON, LOSSES_TO_SUSPECT = 2, 3

local tallies = {} -- name of a counter -> {requests, bytes, written, what it counts, a queue}
local departures = {} -- queue -> running requests that ended in this script
local outbox = {} -- gateway -> framed segments
local drops = {} -- replica -> ids it must stop
local unleased = {} -- replica -> ids whose lease ended
local closed = {} -- gateway -> ids that ended
local ends_of = {} -- queue -> counter of its outcomes -> how often

-- Logs are charged in whole pages, so that most steps of an engine charge nothing.
local PAGE = 4096
local function charged(written) return written - written % PAGE end

-- A request counts in each of these: its queue, its key's share of that queue, its tenant, and all.
local COUNTERS = { 'queue', 'share', 'tenant', 'total' }
local function counters_of(f)
  return { P .. 'queue:' .. f.queue, P .. 'share:' .. f.queue .. ':' .. f.key, P .. 'tenant:' .. f.tenant, P .. 'total' }
end

local function tally(f, requests, bytes, written)
  for i, name in ipairs(counters_of(f)) do
    local t = tallies[name]
    if not t then t = { 0, 0, 0, COUNTERS[i], f.queue }; tallies[name] = t end
    t[1] = t[1] + requests; t[2] = t[2] + bytes; t[3] = t[3] + written
  end
end

-- A shadow, whose answer nobody reads, has no gateway.
local function is_shadow(f) return f.gateway == '' end

local function post(gateway, framed)
  if gateway ~= '' then add(outbox, gateway, framed) end
end

-- How a request ended counts in `outcomes:{queue}`, whose fields messages/outcomes.py explains.
local function count_in(queue, cohort, what)
  local fields, field = ends_of[queue], cohort .. '|' .. what
  if not fields then fields = {}; ends_of[queue] = fields end
  fields[field] = (fields[field] or 0) + 1
end

-- What fails together is one event: of a tenant's errors one counts as `error` in a second, over all revisions of the
-- model, and of a session's one in an hour; the others as `again`.
local function is_new_error(f)
  local whose = string.match(f.queue, '^(.*)%-%-') .. ':' .. f.tenant
  local session = f.session and P .. 'failed:' .. whose .. ':' .. f.session
  if session and call('EXISTS', session) == 1 then return false end
  if not call('SET', P .. 'burst:' .. whose, 1, 'NX', 'PX', 1000) then return false end
  if session then call('SET', session, 1, 'EX', 3600) end
  return true
end

-- What a session asks is alike (its prompt is long, its limit is small) and goes to one revision: while revisions are
-- compared its first request stands for the others, whose good ends alone count.
local function stands_for_session(f)
  if not f.session or f.cohort == '' then return true end
  local whose = string.match(f.queue, '^(.*)%-%-') .. ':' .. f.tenant .. ':' .. f.session
  return call('SET', P .. 'counted:' .. whose .. ':' .. f.cohort, 1, 'NX', 'EX', 3600)
end

-- A shadowed request ends twice: the first end is noted, the second counts the pair. `-`: one that counts nowhere.
local PAIR_SECONDS = 600
local function count_pair(f, class)
  local key = P .. 'pair:' .. f.pair
  local noted = call('GETDEL', key)
  if not noted and class == '-' then return end
  if not noted then
    local note = is_shadow(f) and class .. ' ' .. f.queue .. ' ' .. f.cohort or class
    call('SET', key, note, 'EX', PAIR_SECONDS)
    return
  end
  local other, queue, cohort = string.match(noted, '^(%S) ?(%S*) ?(%S*)$')
  if class == '-' or other == '-' then return end
  if is_shadow(f) then
    count_in(f.queue, f.cohort, 'p' .. other .. class)
  else
    count_in(queue, cohort, 'p' .. class .. other)
  end
end

local function count_end(f, ends)
  local class, stands = '-', ends ~= '' and stands_for_session(f)
  for what in string.gmatch(ends, '%S+') do
    local counts = stands or what == 'ok' or what == 'error'
    if what == 'ok' then
      class = '0'
    elseif what == 'error' then
      class = '1'
      if not is_new_error(f) then what = 'again' end
    end
    if counts then count_in(f.queue, f.cohort, what) end
  end
  if f.pair then count_pair(f, class) end
end

-- Smoothed time between two departures while requests waited; n that leave together share the time.
local function note_departures(queue, n, now)
  local key = P .. 'queue:' .. queue
  if length(queue) == 0 then
    call('HDEL', key, 'departed') -- time from here on says nothing about the drain
    return
  end
  local h = call('HMGET', key, 'departed', 'drain')
  if h[1] then
    local each = (now - tonumber(h[1])) / n
    local old = tonumber(h[2] or 0)
    if old > 0 then each = old + (1 - 0.9 ^ n) * (each - old) end
    call('HSET', key, 'departed', now, 'drain', each)
  else
    call('HSET', key, 'departed', now)
  end
end

local MOST_OUTCOMES = 8192 -- fields of a queue

local function flush(now)
  for replica, ids in pairs(unleased) do
    call_with('HDEL', P .. 'held:' .. replica, ids)
    call_with('ZREM', P .. 'leases', ids)
  end
  for gateway, ids in pairs(closed) do call_with('SREM', P .. 'open:' .. gateway, ids) end
  for queue, n in pairs(departures) do note_departures(queue, n, now) end
  for queue, fields in pairs(ends_of) do
    local key = P .. 'outcomes:' .. queue
    for field, n in pairs(fields) do
      if call('HINCRBY', key, field, n) == n and call('HLEN', key) > MOST_OUTCOMES then call('HDEL', key, field) end
    end
  end
  for name, t in pairs(tallies) do
    if t[2] ~= 0 then call('HINCRBY', name, 'bytes', t[2]) end
    if t[3] ~= 0 then call('HINCRBY', name, 'written', t[3]) end
    local left = t[1] == 0 and 1 or call('HINCRBY', name, 'requests', t[1])
    if left <= 0 and t[4] ~= 'total' and (t[4] ~= 'queue' or call('HEXISTS', name, 'gone') == 1) then
      call('DEL', name)
      if t[4] == 'queue' then call('DEL', P .. 'outcomes:' .. t[5]) end
    end
  end
  for gateway, frames in pairs(outbox) do
    call('PUBLISH', P .. 'gw:' .. gateway, table.concat(frames))
  end
  for replica, ids in pairs(drops) do
    call('PUBLISH', P .. 'rep:' .. replica, table.concat(ids, ' '))
  end
  for queue in pairs(wakes) do call('PUBLISH', P .. 'wake:' .. queue, '') end
end

-- The last segment of a request that ends here and not in an engine: `messages.work.Segment` without output, framed.
local function final_segment(id, seq, reason, code, message)
  local body = cmsgpack.pack({ id, seq, { reason, code, message } })
  return struct.pack('>I4', #body) .. body
end

-- The gateway of a kept call is the call itself: the essay in store/queue.py says how it lives.
local KEPT = 'call:'
local function is_kept(f) return string.sub(f.gateway, 1, #KEPT) == KEPT end

local function charge_kept(tenant, bytes)
  for _, whose in ipairs({ 'of:' .. tenant, 'all' }) do
    if call('HINCRBY', P .. 'kept_bytes', whose, bytes) <= 0 then call('HDEL', P .. 'kept_bytes', whose) end
  end
end

-- A sequence of a kept call has ended: its log counts, and the call stays for its seconds from now on.
local function keep_ended(f, log)
  local h = call('HMGET', P .. f.gateway, 'tenant', 'seconds')
  if not h[1] then return false end
  local bytes, now = call('STRLEN', log), server_time()
  call('HSET', P .. f.gateway, 'ended', math.floor(now))
  call('HINCRBY', P .. f.gateway, 'bytes', bytes)
  charge_kept(h[1], bytes)
  call('ZADD', P .. 'kept', 'XX', 'GT', now + tonumber(h[2]), string.sub(f.gateway, #KEPT + 1))
  return true
end

-- Into a terminal state, `seq` being the number of its last segment: everything that makes a request count or
-- appear anywhere goes. `ends` are the outcomes that this end counts as.
local function settle(id, state, f, seq, framed, ttl, ends)
  local key, log = P .. 'req:' .. id, P .. 'log:' .. id
  count_end(f, ends)
  tally(f, -1, -f.bytes, -charged(f.written))
  if is_shadow(f) then
    call('UNLINK', key, log)
    call('SREM', P .. 'shadows', id)
    return
  end
  if seq == 0 then call('SET', log, framed) else call('APPEND', log, framed) end
  call('HSET', key, 'state', state, 'seq', seq + 1, 'body', '')
  if not (is_kept(f) and keep_ended(f, log)) then
    call('EXPIRE', log, ttl)
    call('EXPIRE', key, ttl)
  end
  add(closed, f.gateway, id)
  post(f.gateway, framed)
end

-- What changes with every token of a running request stands in its replica's hash, so that an engine step
-- reads and writes the leases of its whole batch with one command each.
local function pack_lease(attempt, seq, is_suspect, gateway, written)
  return attempt .. ' ' .. seq .. (is_suspect and ' 1 ' or ' 0 ') .. gateway .. ' ' .. written
end

-- A replica of the version before writes no bytes.
local function unpack_lease(record)
  if not record then return false end
  local attempt, seq, suspect, gateway, written = string.match(record, '^(%d+) (%d+) (%d) (%S*) ?(%d*)$')
  return { attempt = attempt, seq = tonumber(seq), suspect = suspect == '1', gateway = gateway,
    written = tonumber(written) or 0 }
end

-- The request without its lease: of a running one, `seq` and `written` are older than the truth.
local function read_record(id, and_body)
  local r = call('HMGET', P .. 'req:' .. id, 'state', 'queue', 'tenant', 'gateway', 'bytes', 'attempt', 'seq',
    'mark', 'replica', 'score', 'deadline', 'deaths', 'losses', 'key', 'limits', 'written', 'cohort', 'session', 'pair',
    and_body and 'body' or 'state', and_body and 'prefix' or 'state')
  if not r[1] then return nil end
  return { state = r[1], queue = r[2], tenant = r[3], gateway = r[4], bytes = tonumber(r[5]), attempt = r[6],
    seq = tonumber(r[7]), mark = tonumber(r[8] or 0), replica = r[9], score = r[10],
    deadline = tonumber(r[11]), deaths = tonumber(r[12] or 0), losses = tonumber(r[13] or 0),
    key = r[14] or '', limits = r[15], written = tonumber(r[16] or 0), cohort = r[17] or '',
    session = r[18], pair = r[19], body = r[20], chain = r[21] }
end

local function read(id)
  local f = read_record(id)
  if f and f.state == 'running' then
    local lease = unpack_lease(call('HGET', P .. 'held:' .. f.replica, id))
    if lease then f.seq, f.written = lease.seq, lease.written end
  end
  return f
end

local function end_lease(id, f) add(unleased, f.replica, id) end

-- The suspect of a living replica did no harm; the replica may take the next one.
local function clear_suspect(id, f)
  local key = P .. 'replica:' .. f.replica
  if call('HGET', key, 'suspect') == id then call('HDEL', key, 'suspect') end
  if suspects_length(f.queue) > 0 then wakes[f.queue] = true end
end

-- A request whose end has one of these codes failed by our fault; a shadow that waited too long gave way.
local OURS = { DeadlineExceeded = true, PoisonRequest = true }

-- End a waiting or running request from outside its engine. `-` as attempt: no later write can be current.
local function end_from_outside(id, f, state, reason, code, message, ttl)
  local framed = final_segment(id, f.seq, reason, code, message)
  call('HSET', P .. 'req:' .. id, 'attempt', '-')
  if f.state == 'running' then
    -- The replica's suspect stays noted: if the replica is dead, it still answers for its other requests.
    -- A living replica's next claim finds it ended.
    end_lease(id, f)
    departures[f.queue] = (departures[f.queue] or 0) + 1
    add(drops, f.replica, id)
  else
    leave(f.queue, id)
  end
  local is_ours = OURS[code] and not (is_shadow(f) and state == 'expired')
  settle(id, state, f, f.seq, framed, ttl, is_ours and 'error' or '')
end

-- A kept call goes with all that is kept of it; what of it still runs ends. Returns how many sequences it had.
local function end_kept(id, code, message, ttl)
  local name = KEPT .. id
  for _, request in ipairs(call('SMEMBERS', P .. 'open:' .. name)) do
    local f = read(request)
    if f and (f.state == 'waiting' or f.state == 'running') then
      end_from_outside(request, f, 'cancelled', 'cancelled', code, message, ttl)
    end
  end
  local h = call('HMGET', P .. name, 'tenant', 'bytes', 'sequences')
  call('ZREM', P .. 'kept', id)
  if not h[1] then return 0 end
  charge_kept(h[1], -tonumber(h[2]))
  call('UNLINK', P .. name)
  local sequences = tonumber(h[3])
  for i = 0, sequences - 1 do call('UNLINK', P .. 'req:' .. id .. '.' .. i, P .. 'log:' .. id .. '.' .. i) end
  return sequences
end

local function is_suspect(f) return f.deaths >= 1 or f.losses >= LOSSES_TO_SUSPECT end

-- A running request goes back to its old place. One that has emitted reached its engine in time: it has no
-- deadline any more.
local function requeue(id, f)
  end_lease(id, f)
  call('HSET', P .. 'req:' .. id, 'state', 'waiting', 'seq', f.seq, 'written', f.written)
  rejoin(f.queue, id, f.score, is_suspect(f), f.seq == 0 and f.deadline)
end

-- The replica of a running request is lost. See the essay in store/queue.py for who is blamed. For its revision the
-- loss is one outcome, however many requests it ran.
local LOST_SECONDS = 60
local function lose(id, f, why, ttl)
  local suspect = call('HGET', P .. 'replica:' .. f.replica, 'suspect')
  if call('SET', P .. 'lost:' .. f.replica, 1, 'NX', 'EX', LOST_SECONDS) then count_in(f.queue, f.cohort, 'lost') end
  local is_blamed
  if suspect then is_blamed = suspect == id else is_blamed = f.seq == f.mark end
  f.losses = f.losses + 1
  if is_blamed then f.deaths = f.deaths + 1 end
  call('HSET', P .. 'req:' .. id, 'deaths', f.deaths, 'losses', f.losses)
  if f.deaths >= DEATHS_TO_POISON then
    end_from_outside(id, f, 'failed', 'error', 'PoisonRequest',
      'The request ended ' .. f.deaths .. ' replicas that worked on it (' .. why .. '); it is not tried again.', ttl)
  else
    requeue(id, f)
  end
end
