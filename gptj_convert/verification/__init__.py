"""Is a converted checkpoint its source? Level by level, with what is found explained."""
