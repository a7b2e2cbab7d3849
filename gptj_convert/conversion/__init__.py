"""Planning and executing a conversion, and the records that it leaves."""
