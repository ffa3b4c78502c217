-- Whether a UEFI guest's variables begin with the usual keys, Secure Boot on.
ALTER TABLE guests ADD COLUMN secure_boot INTEGER NOT NULL DEFAULT 0 CHECK (secure_boot IN (0, 1) AND (secure_boot = 0 OR boot = 'uefi'));
