"""`keel data import`: data of other layouts into Keel's format, streaming. See `run.import_data`; one file per layout."""
