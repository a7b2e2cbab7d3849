"""A training job as it is asked for, validated, launched and shown."""
