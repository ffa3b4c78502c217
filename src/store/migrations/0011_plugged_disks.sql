-- The PCI slot that a disk was seen in last and stays in; and whether its running guest was asked to let it go for good.
ALTER TABLE disks ADD COLUMN slot INTEGER CHECK (slot BETWEEN 8 AND 15);
ALTER TABLE disks ADD COLUMN leaving INTEGER NOT NULL DEFAULT 0 CHECK (leaving IN (0, 1));
