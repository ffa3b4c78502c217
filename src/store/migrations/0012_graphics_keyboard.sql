-- Whether the guest's graphics card is a virtio one beside being a VGA, and whether it has a virtio keyboard beside the usual one.
ALTER TABLE guests ADD COLUMN gpu INTEGER NOT NULL DEFAULT 0 CHECK (gpu IN (0, 1));
ALTER TABLE guests ADD COLUMN virtio_keyboard INTEGER NOT NULL DEFAULT 0 CHECK (virtio_keyboard IN (0, 1));
