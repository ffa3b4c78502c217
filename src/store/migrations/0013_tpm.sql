-- Whether the guest has a TPM 2.0.
ALTER TABLE guests ADD COLUMN tpm INTEGER NOT NULL DEFAULT 0 CHECK (tpm IN (0, 1));
