-- The waiting line of each queue, and until when who waits may. Only this file knows how they are kept: per queue two
-- sets by score, of requests that may have killed a replica (suspects) and of all others, and one set of deadlines.
local PLAIN, SUSPECTS, DEADLINES = P .. 'waiting:', P .. 'suspects:', P .. 'deadlines'

local lines = {} -- queue -> its line, see line_of

local deadlines = {} -- of those who joined: deadline, id, ...

-- Lower scores are taken first. 2^42 submits fit into one band of priority; +-1000 bands into a double.
local BAND = 4398046511104
local function score_of(order, priority) return order - priority * BAND end

local function suspects_length(queue) return call('ZCARD', SUSPECTS .. queue) end

local function length(queue) return call('ZCARD', PLAIN .. queue) + suspects_length(queue) end

-- The line as this script found it, and who joined since. Not for scripts that take from it.
local function line_of(queue)
  local line = lines[queue]
  if not line then
    local plain, suspects = call('ZCARD', PLAIN .. queue), suspects_length(queue)
    line = { length = plain + suspects, plain = plain, suspects = suspects, scores = {} }
    lines[queue] = line
  end
  return line
end

local function write_scores(queue, line)
  call_with('ZADD', PLAIN .. queue, line.scores)
  line.scores = {}
end

-- A new request joins, once write_joined() is called. Returns whether all of the line is ahead of it.
local function join(queue, id, score, deadline)
  local line = line_of(queue)
  if line.plain == 0 then
    wakes[queue] = true
    line.last = -math.huge
  elseif not line.last then
    line.last = tonumber(call('ZRANGE', PLAIN .. queue, -1, -1, 'WITHSCORES')[2])
  end
  local scores, is_last = line.scores, score >= line.last
  if is_last then line.last = score end
  scores[#scores + 1] = score
  scores[#scores + 1] = id
  deadlines[#deadlines + 1] = deadline
  deadlines[#deadlines + 1] = id
  line.plain, line.length = line.plain + 1, line.length + 1
  return is_last
end

local function write_joined()
  for queue, line in pairs(lines) do write_scores(queue, line) end
  call_with('ZADD', DEADLINES, deadlines)
end

-- A request comes back to its old place. Without a deadline it may wait as long as it takes.
local function rejoin(queue, id, score, is_suspect, deadline)
  call('ZADD', is_suspect and SUSPECTS .. queue or PLAIN .. queue, score, id)
  if deadline then call('ZADD', DEADLINES, deadline, id) end
  wakes[queue] = true
end

-- The ids among whom a claim may choose: up to `most` from the front, of one priority, suspects left aside. Once one of
-- them was passed over only these are, until all are taken (a round: the score of its last in `round:{band}`). So at
-- most `most - 1` are taken before one that came sooner, but for those that come back or are moved here.
-- Returns also what `pass_over` needs; nil where it was called before.
local function among(queue, most)
  local found, ids = call('ZRANGE', PLAIN .. queue, 0, most - 1, 'WITHSCORES'), {}
  if #found == 0 then return ids end
  local band = math.floor(found[2] / BAND)
  local round, last = 'round:' .. band, nil
  local upto = #found > 2 and tonumber(call('HGET', P .. 'queue:' .. queue, round) or nil)
  if upto and upto < tonumber(found[2]) then
    call('HDEL', P .. 'queue:' .. queue, round)
    upto = nil
  end
  for i = 1, #found, 2 do
    local score = tonumber(found[i + 1])
    if score > (upto or score) or math.floor(score / BAND) > band then break end
    ids[#ids + 1] = found[i]
    last = found[i + 1]
  end
  return ids, not upto and { round, last }
end

local function pass_over(queue, round) call('HSET', P .. 'queue:' .. queue, unpack(round)) end

local function take(queue, ids)
  call_with('ZREM', PLAIN .. queue, ids)
  call_with('ZREM', DEADLINES, ids)
end

-- Take up to `most` from the front, suspects left aside.
local function take_first(queue, most)
  local popped, ids = call('ZPOPMIN', PLAIN .. queue, most), {}
  for i = 1, #popped, 2 do ids[#ids + 1] = popped[i] end
  call_with('ZREM', DEADLINES, ids)
  return ids
end

-- Take the first suspect, where fewer than `most` others are ahead of it; nil where it is nobody's turn.
local function take_suspect(queue, most)
  local first = call('ZRANGE', SUSPECTS .. queue, 0, 0, 'WITHSCORES')
  local id, score = first[1], first[2]
  if not id or call('ZCOUNT', PLAIN .. queue, '-inf', '(' .. score) >= most then return nil end
  call('ZREM', SUSPECTS .. queue, id)
  call('ZREM', DEADLINES, id)
  return id
end

local function leave(queue, id)
  local plain, suspects = call('ZREM', PLAIN .. queue, id), call('ZREM', SUSPECTS .. queue, id)
  call('ZREM', DEADLINES, id)
  local line = lines[queue]
  if line then
    line.plain, line.suspects = line.plain - plain, line.suspects - suspects
    line.length = line.length - plain - suspects
  end
end

-- The number of those ahead; nil for one that does not wait.
local function rank(queue, id)
  local line = line_of(queue)
  if #line.scores > 0 then write_scores(queue, line) end
  local ahead = call('ZRANK', PLAIN .. queue, id)
  if ahead then return ahead + line.suspects end
  return line.suspects > 0 and call('ZRANK', SUSPECTS .. queue, id) or nil
end

-- Up to `most` that wait, in no promised order.
local function some_of(queue, most)
  local ids = call('ZRANGE', SUSPECTS .. queue, 0, most - 1)
  if #ids == most then return ids end
  for _, id in ipairs(call('ZRANGE', PLAIN .. queue, 0, most - #ids - 1)) do ids[#ids + 1] = id end
  return ids
end

-- Up to `most` whose deadline has passed; none of them is found a second time.
local function take_overdue(now, most)
  local ids = call('ZRANGE', DEADLINES, '-inf', now, 'BYSCORE', 'LIMIT', 0, most)
  call_with('ZREM', DEADLINES, ids)
  return ids
end

