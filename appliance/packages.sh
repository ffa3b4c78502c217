#!/bin/bash
# Distribution packages for the scripts here (sourced by bash): install what is missing, or fetch one and unpack it without installing.
# Sourcing it sets INNKEEPER_CACHE (default ~/.cache/innkeeper); nothing is ever written beside the sources.

INNKEEPER_CACHE=${INNKEEPER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/innkeeper}

# say TEXT…: progress for a person, on standard error so that standard output stays the command's own.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# fail TEXT…: say it and end with 125, which no command run in the lab returns by itself.
fail() {
  say "$*"
  exit 125
}

# as_root COMMAND…: directly when root, by sudo otherwise.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo -- "$@"
  else
    fail "this needs root, and there is no sudo: $*"
  fi
}

# apt_lists: package lists that are there, and of today: old ones name packages that are not on the servers any more. A fresh container has none.
apt_lists() {
  local there=no
  if apt-cache show base-files >/dev/null 2>&1 && [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit 2>/dev/null)" ]; then there=yes; fi
  if [ $there = yes ] && [ -n "$(find "$INNKEEPER_CACHE/apt-lists" /var/lib/apt/lists -maxdepth 0 -mtime -1 2>/dev/null)" ]; then return; fi
  say "fetching package lists"
  # Without a network what is there has to do.
  as_root apt-get -q update >&2 || [ $there = yes ] || fail "could not fetch the package lists"
  mkdir -p "$INNKEEPER_CACHE"
  touch "$INNKEEPER_CACHE/apt-lists"
}

# need TOOL PACKAGE [TOOL PACKAGE]…: installs the packages whose tool (a command, or a path when it has a slash) is missing.
need() {
  local missing=()
  while [ $# -ge 2 ]; do
    case $1 in
      */*) [ -e "$1" ] || missing+=("$2") ;;
      *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || missing+=("$2") ;;
    esac
    shift 2
  done
  [ ${#missing[@]} = 0 ] && return
  apt_lists
  say "installing ${missing[*]}"
  local log
  log=$(as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${missing[@]}" 2>&1 </dev/null) || {
    printf '%s\n' "$log" >&2
    fail "could not install: ${missing[*]}"
  }
}

# unpack_package PACKAGE FOLDER: the package's files under FOLDER, without installing it. FOLDER appears only when complete.
unpack_package() {
  local package=$1 folder=$2 part
  [ -d "$folder" ] && return
  apt_lists
  mkdir -p "$(dirname "$folder")"
  part=$(mktemp -d "$folder.part.XXXXXX")
  say "fetching $package"
  (cd "$part" && apt-get -qq download "$package" 2>"$part/log" >&2) || {
    cat "$part/log" >&2
    rm -rf "$part"
    fail "could not fetch the package $package"
  }
  mkdir "$part/files"
  dpkg-deb -x "$part"/*.deb "$part/files"
  mv "$part/files" "$folder"
  rm -rf "$part"
}

# unpack_from SUITE FOLDER PACKAGE…: packages of another suite of Debian, under FOLDER; the system's own lists stay as they are.
unpack_from() {
  local suite=$1 folder=$2 state code=0
  shift 2
  state=$(mktemp -d)
  mkdir -p "$state/lists/partial" "$state/archives/partial" "$state/packages"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main" >"$state/sources"
  local options=(-o Dir::Etc::SourceList="$state/sources" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state"
    -o Acquire::Languages=none -o APT::Sandbox::User=)
  (
    set -e
    cd "$state/packages"
    apt-get -qq "${options[@]}" update
    apt-get -qq "${options[@]}" download "${@/%//$suite}"
    for package in *.deb; do dpkg-deb -x "$package" "$folder"; done
  ) || code=$?
  rm -rf "$state"
  return $code
}

# newest_package NAME PREFIX: the versioned package a meta package such as linux-image-amd64 stands for today.
newest_package() {
  apt_lists
  apt-cache depends "$1" 2>/dev/null | awk -v p="$2" '$1 == "Depends:" && index($2, p) == 1 {print $2; exit}'
}
