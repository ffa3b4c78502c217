-- What happens when the guest does not feed its watchdog; 'none' is a guest without one.
ALTER TABLE guests ADD COLUMN watchdog TEXT NOT NULL DEFAULT 'none' CHECK (watchdog IN ('none', 'reset', 'power_off', 'pause'));
