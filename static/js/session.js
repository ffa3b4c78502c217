// Whether this browser is still logged in. Once it is not, the page says so, with the way back in.

/** Asks the server; a server that does not answer says nothing about logins. */
export async function loggedOut() {
  try {
    const { status } = await fetch("/api/v1/session", { cache: "no-store" });
    if (status !== 401) return false;
  } catch {
    return false;
  }
  sayLoggedOut();
  return true;
}

export function sayLoggedOut() {
  if (document.getElementById("logged-out")) return;
  const banner = document.createElement("p");
  banner.id = "logged-out";
  banner.className = "banner flash level-degraded";
  banner.setAttribute("role", "alert");
  const words = document.createElement("span");
  words.textContent = "You are logged out. What this page shows is no longer live.";
  const login = document.createElement("a");
  login.className = "button small";
  login.href = `/login?next=${encodeURIComponent(location.pathname)}`;
  login.textContent = "Log in";
  banner.append(words, login);
  document.getElementById("main").prepend(banner);
}
