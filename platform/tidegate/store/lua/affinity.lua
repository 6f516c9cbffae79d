-- Which replica most likely holds how a prompt begins: per queue a hash from a piece of a prompt's chain
-- (messages/prefixes.py) to those that leased a request with it last, with spaces around each. A hint: an engine forgets.
local MOST_KNOWN, MOST_HOLDERS, HASH_BYTES, KNOWN_SECONDS = 4096, 4, 8, 3600

local function knows_any(queue) return call('EXISTS', P .. 'prefixes:' .. queue) == 1 end

-- Who holds the longest piece of each of these requests that anybody holds, whether `replica` does, and whether so many
-- do that others will: what all begin with has no better place. What was read is added to `known`: piece -> holders.
local function holders_of(queue, replica, ids, known)
  local pieces, chains, found = {}, {}, {}
  for i, id in ipairs(ids) do
    local chain = call('HGET', P .. 'req:' .. id, 'prefix') or ''
    chains[i] = chain
    for at = 1, #chain, HASH_BYTES do
      local piece = string.sub(chain, at, at + HASH_BYTES - 1)
      if known[piece] == nil then known[piece] = false; pieces[#pieces + 1] = piece end
    end
  end
  if #pieces > 0 then
    for i, holders in ipairs(call('HMGET', P .. 'prefixes:' .. queue, unpack(pieces))) do known[pieces[i]] = holders end
  end
  for i, id in ipairs(ids) do
    for at = #chains[i] - HASH_BYTES + 1, 1, -HASH_BYTES do
      local holders = known[string.sub(chains[i], at, at + HASH_BYTES - 1)]
      if holders then
        local _, spaces = string.gsub(holders, ' ', '')
        found[id] = { holders = holders, is_own = string.find(holders, ' ' .. replica .. ' ', 1, true) ~= nil,
          is_common = spaces > MOST_HOLDERS }
        break
      end
    end
  end
  return found
end

-- From now on `replica` holds these chains too, or `alone`: engines forget, and nobody says so.
local function hold(queue, replica, chains, known, alone)
  local fields, is_done = {}, {}
  for _, chain in ipairs(chains) do
    for at = 1, #chain, HASH_BYTES do
      local piece = string.sub(chain, at, at + HASH_BYTES - 1)
      local holders, count = ' ' .. replica .. ' ', 1
      if not is_done[piece] and (alone or string.sub(known[piece] or '', 1, #holders) ~= holders) then
        for other in string.gmatch(not alone and known[piece] or '', '%S+') do
          if other ~= replica and count < MOST_HOLDERS then holders = holders .. other .. ' '; count = count + 1 end
        end
        fields[#fields + 1] = piece
        fields[#fields + 1] = holders
      end
      is_done[piece] = true
    end
  end
  local key = P .. 'prefixes:' .. queue
  if call_with('HSET', key, fields) == 0 then return end
  local too_many = call('HLEN', key) - MOST_KNOWN
  if too_many > 0 then call_with('HDEL', key, call('HRANDFIELD', key, too_many)) end
  call('EXPIRE', key, KNOWN_SECONDS)
end
