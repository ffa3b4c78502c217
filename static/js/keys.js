// Characters and names of keys as the keyboard events of a guest's screen.

const SHIFTED = new Map([..."~!@#$%^&*()_+{}|:\"<>?"].map((c, i) => [c, "`1234567890-=[]\\;',./"[i]]));
const NAMED = { "`": "Backquote", "-": "Minus", "=": "Equal", "[": "BracketLeft", "]": "BracketRight", "\\": "Backslash", ";": "Semicolon", "'": "Quote", ",": "Comma", ".": "Period", "/": "Slash", " ": "Space" };

export const SHIFT = [0xffe1, "ShiftLeft"];
export const CTRL = [0xffe3, "ControlLeft"];
export const ALT = [0xffe9, "AltLeft"];
export const SUPER = [0xffeb, "MetaLeft"];
export const MODIFIERS = [SHIFT, CTRL, ALT, SUPER, [0xffe2, "ShiftRight"], [0xffe4, "ControlRight"], [0xffea, "AltRight"]];
const PLAIN = { esc: [0xff1b, "Escape"], tab: [0xff09, "Tab"], enter: [0xff0d, "Enter"], backspace: [0xff08, "Backspace"] };

/** The keys of a button's name: "esc", "cf2" for Ctrl+Alt+F2. All go down in order and up in reverse. */
export function chord(name) {
  const f = /^cf(\d+)$/.exec(name);
  if (f) return [CTRL, ALT, [0xffbd + Number(f[1]), `F${f[1]}`]];
  return PLAIN[name] ? [PLAIN[name]] : [];
}

/** The keys that type one character on a US keyboard; a character it does not have goes by its keysym alone. */
export function typed(character) {
  if (character === "\n" || character === "\r") return [PLAIN.enter];
  if (character === "\t") return [PLAIN.tab];
  const point = character.codePointAt(0);
  const lower = SHIFTED.get(character) ?? character.toLowerCase();
  const code = /^[a-z]$/.test(lower) ? `Key${lower.toUpperCase()}` : /^[0-9]$/.test(lower) ? `Digit${lower}` : NAMED[lower];
  if (!code) return point < 0x20 ? [] : [[point < 0x100 ? point : 0x01000000 | point, null]];
  const key = [point, code];
  return lower === character ? [key] : [SHIFT, key];
}
