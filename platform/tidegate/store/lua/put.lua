-- Write one field of what gateways follow, and tell them. ARGV: models, keys or reports; field, text
call('HSET', P .. ARGV[1], ARGV[2], ARGV[3])
call('PUBLISH', P .. 'changed:' .. ARGV[1], ARGV[2])
return 0
