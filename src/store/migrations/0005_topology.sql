-- How vCPUs are grouped; cores are what is left.
ALTER TABLE guests ADD COLUMN sockets INTEGER NOT NULL DEFAULT 1 CHECK (sockets BETWEEN 1 AND 64);
ALTER TABLE guests ADD COLUMN threads INTEGER NOT NULL DEFAULT 1 CHECK (threads BETWEEN 1 AND 64);
