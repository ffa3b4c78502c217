-- How much a guest may ask of a disk in a second; NULL for as much as it can.
ALTER TABLE disks ADD COLUMN bytes_per_s INTEGER CHECK (bytes_per_s > 0);
ALTER TABLE disks ADD COLUMN operations_per_s INTEGER CHECK (operations_per_s > 0);
