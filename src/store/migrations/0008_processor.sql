-- The processor that the guest sees, Hyper-V's enlightenments for Windows, whether its RAM is out of the host's huge pages, whether
-- it has a socket device to the host, and whether it has USB.
ALTER TABLE guests ADD COLUMN cpu_model TEXT NOT NULL DEFAULT 'host' CHECK (cpu_model IN ('host', 'portable'));
ALTER TABLE guests ADD COLUMN hyperv INTEGER NOT NULL DEFAULT 0 CHECK (hyperv IN (0, 1));
ALTER TABLE guests ADD COLUMN huge_pages INTEGER NOT NULL DEFAULT 0 CHECK (huge_pages IN (0, 1));
ALTER TABLE guests ADD COLUMN vsock INTEGER NOT NULL DEFAULT 0 CHECK (vsock IN (0, 1));
ALTER TABLE guests ADD COLUMN usb INTEGER NOT NULL DEFAULT 0 CHECK (usb IN (0, 1));
