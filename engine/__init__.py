"""The machinery: files, flags, processes, channels, tables. It imports nothing outside itself."""
