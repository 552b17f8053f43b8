"""Corpora, shards and the order in which samples are read. Knows no process group: ranks are plain integers."""
