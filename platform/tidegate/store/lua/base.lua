-- The first part of every script. KEYS[1] is the key prefix with its colon. Redis does not roll back a script that
-- fails: every script checks before its first write. Each command costs about 2 us, whatever it does, so what can
-- be written together is gathered and goes out with flush(), the last thing a script does.
local P = KEYS[1]
local call = redis.call
local CHUNK = 1000 -- of what unpack may lay on Lua's stack; even
local wakes = {} -- queue -> true: its replicas are woken

local function server_time()
  local t = call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function add(lists, name, item)
  local list = lists[name]
  if list then list[#list + 1] = item else lists[name] = { item } end
end

-- One command that answers with a number, with any number of arguments. Returns the sum of the answers.
local function call_with(command, key, arguments)
  local sum = 0
  for from = 1, #arguments, CHUNK do
    sum = sum + call(command, key, unpack(arguments, from, math.min(from + CHUNK - 1, #arguments)))
  end
  return sum
end
