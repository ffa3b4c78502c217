-- What firmware tries first to last: words (the id of a disk, cd, network) between spaces. What is not named follows by itself.
ALTER TABLE guests ADD COLUMN boot_order TEXT NOT NULL DEFAULT '';
