#!/bin/bash
# What run, install and test share (sourced by bash, after packages.sh): the tools to build with, and the build, as the person who called.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# caller: the person who called, also behind sudo.
caller() { if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ]; then echo "$SUDO_USER"; else id -un; fi; }
caller_home() { getent passwd "$(caller)" | cut -d: -f6; }

# as_caller COMMAND…: with the caller's rights, home and Rust. Only what a build needs of the environment goes along.
as_caller() {
  local home keep=() name
  home=$(caller_home)
  for name in CARGO_HOME CARGO_TARGET_DIR CARGO_BUILD_JOBS CARGO_NET_OFFLINE RUSTUP_HOME RUSTUP_TOOLCHAIN UI_DIST TERM http_proxy https_proxy no_proxy; do
    [ -z "${!name:-}" ] || keep+=("$name=${!name}")
  done
  # The caller's own PATH where there is one: it may name a Rust or a node of theirs. sudo has put its own in its place.
  local path=${CARGO_HOME:-$home/.cargo}/bin:$PATH
  if [ "$(caller)" = "$(id -un)" ]; then
    env PATH="$path" ${keep[@]+"${keep[@]}"} "$@"
  else
    runuser -u "$(caller)" -- env -i HOME="$home" USER="$(caller)" LANG="${LANG:-C.UTF-8}" PATH="$path:/usr/local/bin:/usr/bin:/bin" ${keep[@]+"${keep[@]}"} "$@"
  fi
}

# at_least HAVE WANTED: versions, compared number by number.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

rust_wanted() { sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$top/Cargo.toml"; }
rust_have() { as_caller rustc --version 2>/dev/null | awk '{print $2}'; }
rust_is_new_enough() {
  local have
  have=$(rust_have) && [ -n "$have" ] && at_least "$have" "$(rust_wanted)" && as_caller cargo --version >/dev/null 2>&1
}

# candidate PACKAGE: the version apt would install, without epoch and revision; nothing when there is none.
candidate() { apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" {print $2}' | sed 's/^[0-9]*://; s/[+~-].*//'; }

# need_rust: a Rust as new as Cargo.toml wants; the first of these ways that leads there.
need_rust() {
  local wanted have package version
  wanted=$(rust_wanted)
  ! rust_is_new_enough || return 0
  have=$(rust_have || true)
  say "Rust $wanted or later is needed; here is ${have:-none}"
  # 1. The caller has rustup: a toolchain more, beside the others.
  if as_caller rustup --version >/dev/null 2>&1; then
    rustup_toolchain
    return
  fi
  apt_lists
  # 2. The distribution's own Rust, also under a versioned name as Ubuntu has it.
  for package in rustc $(apt-cache pkgnames rustc-1. 2>/dev/null | grep -E '^rustc-1\.[0-9]+$' | sort -rV); do
    version=$(candidate "$package")
    if [ -z "$version" ] || ! at_least "$version" "$wanted"; then continue; fi
    need "/usr/bin/$package" "$package" "/usr/bin/cargo${package#rustc}" "cargo${package#rustc}"
    if [ "$package" != rustc ]; then
      as_root ln -sf "/usr/bin/$package" /usr/local/bin/rustc
      as_root ln -sf "/usr/bin/cargo${package#rustc}" /usr/local/bin/cargo
    fi
    rust_is_new_enough && return
  done
  # 3. The distribution's rustup; not where its older Rust is installed, which it would remove.
  if [ -n "$(candidate rustup)" ] && ! dpkg-query -W -f '${Status}' rustc 2>/dev/null | grep -q '^install ok'; then
    need rustup rustup
    rustup_toolchain
    return
  fi
  # 4. rustup from its makers, into the caller's home.
  rustup_init
  rustup_toolchain
}

# rustup_toolchain: today's stable, used for this build whatever the caller's default is.
rustup_toolchain() {
  say "installing Rust with rustup, for $(caller)"
  as_caller rustup toolchain install stable --no-self-update --profile minimal --component clippy --component rustfmt >&2 || no_rust
  export RUSTUP_TOOLCHAIN=stable
  rust_is_new_enough || no_rust
}

rustup_init() {
  local machine folder url
  machine=$(uname -m)-unknown-linux-gnu url=https://static.rust-lang.org/rustup/dist/$machine/rustup-init
  folder=$(as_caller mktemp -d)
  say "fetching rustup from static.rust-lang.org"
  as_caller curl -fsS --proto '=https' --retry 2 -o "$folder/rustup-init" "$url" || no_rust
  as_caller curl -fsS --proto '=https' --retry 2 -o "$folder/sum" "$url.sha256" || no_rust
  [ "$(cut -d' ' -f1 "$folder/sum")" = "$(sha256sum "$folder/rustup-init" | cut -d' ' -f1)" ] || fail "rustup-init is not what its checksum says; nothing was installed"
  chmod +x "$folder/rustup-init"
  as_caller "$folder/rustup-init" -q -y --no-modify-path --profile minimal --default-toolchain none >&2 || no_rust
  rm -rf "$folder"
}

no_rust() { fail "cannot get Rust $(rust_wanted) or later here. Install it by hand (https://rustup.rs), then run this again."; }

# need_node: node and npm, for the pages' scripts. Nothing to do where the pages are given ready-built.
need_node() {
  [ -z "${UI_DIST:-}" ] || return 0
  as_caller sh -c 'command -v node' >/dev/null || need node nodejs
  # A nodejs that does not come from the distribution brings its npm along.
  as_caller sh -c 'command -v npm' >/dev/null || need npm npm
  local have
  have=$(as_caller node --version 2>/dev/null)
  at_least "${have#v}" 18 || fail "the pages are built with node 18 or later; this is ${have:-none}. Install a newer node, or give ready-built pages with UI_DIST."
}

# known PACKAGE…: those of them that this release has.
known() {
  local package
  for package in "$@"; do [ -z "$(candidate "$package")" ] || echo "$package"; done
}

# need_apt: says early, and in one sentence, when this is no system whose packages we know.
need_apt() {
  command -v apt-get >/dev/null || fail "this needs Debian or Ubuntu: there is no apt-get. README.md lists what to install elsewhere."
}

need_to_build() {
  need_apt
  need cc gcc /usr/include/stdio.h libc6-dev ld binutils pkg-config pkg-config curl curl /etc/ssl/certs/ca-certificates.crt ca-certificates
  need_rust
  need_node
}

# need_to_run: what guests are run with. passt, swtpm and ipxe-qemu are not in every release; the network "user", TPMs and network boot by
# BIOS then are missing, and `innkeeper doctor` says so.
need_to_run() {
  need_apt
  need /usr/share/seabios/bios-256k.bin seabios /usr/share/OVMF/OVMF_CODE_4M.fd ovmf ip iproute2 nft nftables dnsmasq dnsmasq-base
  local wanted package
  for wanted in passt:passt swtpm:swtpm /usr/lib/ipxe/qemu/pxe-virtio.rom:ipxe-qemu; do
    package=${wanted#*:} wanted=${wanted%:*}
    [ -e "$wanted" ] || command -v "$wanted" >/dev/null || {
      apt_lists
      [ -z "$(known "$package")" ] || need "$wanted" "$package"
    }
  done
  let_swtpm_work
}

# let_swtpm_work: where AppArmor confines swtpm (Ubuntu), it may keep a TPM only for libvirt, and speak to nobody else. What a site adds to
# that profile is kept by upgrades.
let_swtpm_work() {
  local profile=/etc/apparmor.d/usr.bin.swtpm own=/etc/apparmor.d/local/usr.bin.swtpm
  [ -e $profile ] && ! grep -q Innkeeper $own 2>/dev/null || return 0
  as_root tee -a $own >/dev/null <<'TEXT'
# Innkeeper: the folders of guests' TPMs, and its engines.
owner /**/guests/*/tpm/{,**} rwk,
unix (send, receive) type=stream peer=(label=unconfined),
TEXT
  as_root apparmor_parser --replace $profile || say "AppArmor did not take the new rules of $own: guests with a TPM may not start"
}

# built PROFILE: the program that a build of that profile leaves.
built() { echo "${CARGO_TARGET_DIR:-$top/target}/$1/innkeeper"; }

# build_release: the program as it is used.
build_release() {
  say "building (the first time takes some minutes)"
  (cd "$top" && as_caller cargo build --release --locked >&2) || fail "the build failed; its messages are above"
}
