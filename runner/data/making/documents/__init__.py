"""Documents of source files, by format: streams, lists of JSON and tables."""
