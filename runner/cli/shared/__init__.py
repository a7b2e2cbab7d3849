"""What commands have in common: options, output, errors, progress and signals."""
