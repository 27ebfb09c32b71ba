"""From image folders, zips, TFRecords and LSUN's files to NVAE's LMDB; no torch in here."""
