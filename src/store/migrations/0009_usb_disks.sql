-- One more bus for disks: a check can only be changed together with its table.
CREATE TABLE new_disks (
    id         TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    guest_id   TEXT NOT NULL REFERENCES guests (id),
    position   INTEGER NOT NULL CHECK (position >= 0),
    bus        TEXT NOT NULL CHECK (bus IN ('virtio', 'ahci', 'nvme', 'usb')),
    size_bytes INTEGER NOT NULL CHECK (size_bytes > 0),
    image_id   TEXT REFERENCES images (id),
    read_only  INTEGER NOT NULL DEFAULT 0 CHECK (read_only IN (0, 1)),
    -- Its file is complete; not yet while an image is being copied into it.
    ready      INTEGER NOT NULL DEFAULT 1 CHECK (ready IN (0, 1)),
    created_ms INTEGER NOT NULL,
    UNIQUE (guest_id, position)
) STRICT;
INSERT INTO new_disks (id, guest_id, position, bus, size_bytes, image_id, read_only, ready, created_ms)
SELECT id, guest_id, position, bus, size_bytes, image_id, read_only, ready, created_ms FROM disks;
DROP TABLE disks;
ALTER TABLE new_disks RENAME TO disks;
