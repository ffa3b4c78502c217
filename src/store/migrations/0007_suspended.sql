-- The guest's state is in its file "suspended": the next start goes on from there.
ALTER TABLE guests ADD COLUMN suspended INTEGER NOT NULL DEFAULT 0 CHECK (suspended IN (0, 1));
