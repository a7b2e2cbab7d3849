"""Files and folders that are read by ranges, written whole, locked, hashed and resumed."""
