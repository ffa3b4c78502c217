// What a test sees of a guest's consoles: the picture on the canvas, the text in the terminal, the bytes on the wire.

import { until } from "./test.mjs";

/** The row of the Test guest that says what was typed. */
const TYPED_ROW = 8;
const ROW_PX = 16;

/** Opens the console of a guest and waits for its picture. */
export async function openScreen(page, name) {
  await page.goto(`/guests/${name}/console`);
  await page.waitForSelector('guest-screen[data-link="live"]');
  await until("the screen shows something", async () => (await lit(page)) > 100);
}

/** How many pixels of some rows of text are not black; all rows when none are named. */
export function lit(page, from = 0, rows = 25) {
  return page.evaluate(
    ([y, height]) => {
      const canvas = document.querySelector("guest-screen .console-stage > div:not(.last-picture) canvas");
      if (!canvas?.width) return 0;
      const { data } = canvas.getContext("2d").getImageData(0, y, canvas.width, Math.min(height, canvas.height - y));
      let count = 0;
      for (let at = 0; at < data.length; at += 4) count += data[at] + data[at + 1] + data[at + 2] > 60;
      return count;
    },
    [from * ROW_PX, rows * ROW_PX],
  );
}

export const litTyped = (page) => lit(page, TYPED_ROW, 1);

/** The picture of the typed row as text, to compare what two people see. */
export function typedPicture(page) {
  return page.evaluate(([y, height]) => {
    const canvas = document.querySelector("guest-screen .console-stage > div:not(.last-picture) canvas");
    return canvas.getContext("2d").getImageData(0, y, canvas.width, height).data.filter((_, at) => at % 4 === 1).join();
  }, [TYPED_ROW * ROW_PX, ROW_PX]);
}

export async function openSerial(page, name) {
  await page.goto(`/guests/${name}/serial`);
  await page.waitForSelector('guest-terminal[data-link="live"]');
}

/** The lines of the terminal that can be seen. */
export function serialText(page) {
  return page.locator("guest-terminal .xterm-rows").innerText();
}

/** Keeps what goes over the WebSockets of a page whose address matches: bytes and texts from the server, bytes to it. */
export function wire(page, pattern) {
  const kept = { received: Buffer.alloc(0), texts: [], sent: [], sockets: 0 };
  page.on("websocket", (socket) => {
    if (!pattern.test(socket.url())) return;
    kept.sockets += 1;
    socket.on("framereceived", ({ payload }) => {
      if (typeof payload === "string") kept.texts.push(payload);
      else kept.received = Buffer.concat([kept.received, payload]);
    });
    socket.on("framesent", ({ payload }) => kept.sent.push(Buffer.from(payload)));
  });
  return kept;
}
